"""What a model will do on a machine, before anything is loaded: what fits, how fast, at which cost."""
