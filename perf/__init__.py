"""Benchmarks: one script a question, each beside raw pyzmq doing the same work in the same run."""
