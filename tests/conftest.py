import os

# Before any library reads them: no test may wait for a network, and tiny tensors only lose by more threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
