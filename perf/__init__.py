"""Benchmarks: one script a question, each beside other libraries doing the same work in the same run."""
