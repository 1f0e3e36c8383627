"""What to sample: noise, processors, the sampler, and when a text has ended."""
