"""The executors: one protocol, and the machines that run programs."""
