"""The scheduler and the cache under a load, with steps that are predicted in place of run ones."""
