"""What training a model costs, and which model to train: parameters, tokens, compute, time and money."""
