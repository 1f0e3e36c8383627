"""The CPU executor: programs lowered to launches of a C++ tape."""
