"""Which rows of which sequences run next: queues, a token budget, preemption. No arrays of model data."""
