"""Which modules are adapted and at which rank: placements, allocations, and the scores and spectra behind them."""
