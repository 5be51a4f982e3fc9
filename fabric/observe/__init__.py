"""What can be seen of a fabric: the ledger."""
