"""The search inside every arm. Only this folder knows Optuna; `settings` is the one part that imports without it."""
