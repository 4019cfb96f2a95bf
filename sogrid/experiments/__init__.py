"""What is run: data, benchmarks, training and records (Thesis §4, §5.4, §6.5)."""
