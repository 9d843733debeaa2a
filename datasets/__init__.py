"""The data sets but for those of prepro.py and mnist1d_gen.py, and how files are downloaded and read."""
