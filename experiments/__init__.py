"""Studies with the repository's commands. Run from the repository root: python -m experiments.position_encodings"""
