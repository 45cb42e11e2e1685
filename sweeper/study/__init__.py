"""One command from arms to table: what is planned, who trains it, and what people see of it meanwhile and after."""
