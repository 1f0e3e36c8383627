"""The block layouts of ggml: a module for each kind of code, each with its rows of `storage.STORAGES`."""
