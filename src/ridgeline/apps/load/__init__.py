"""A load generator for servers of OpenAI's API: what is sent, when, what comes back, and its figures."""
