"""The demo's data and measures. Run from the repository root: python -m demo.digits FOLDER"""
