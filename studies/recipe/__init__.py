"""The checks of Karpathy's "A Recipe for Training Neural Networks" (2019): `python -m studies.recipe`."""
