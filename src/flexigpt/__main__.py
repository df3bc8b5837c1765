"""`python -m flexigpt`, for torchrun and friends."""

from flexigpt.cli import main

if __name__ == "__main__":
    main()
