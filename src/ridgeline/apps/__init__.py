"""What is built on the engine's public face, or on programs and machines alone."""
