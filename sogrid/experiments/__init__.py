"""What is run: data, benchmarks, training and records (Thesis §4, §5.4, §6.5)."""

from sogrid.extras import need

need(__name__, "experiments", "numpy", "optuna", "scipy", "tqdm", "pooch", "pyarrow", "PIL")
