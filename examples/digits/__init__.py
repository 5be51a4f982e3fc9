"""The parts of `examples/train_digits.py`: the network and its seeds, the controller, the report."""
