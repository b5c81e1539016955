"""The offline demo: a small policy model, simulated preference pairs and the rule behind them."""
