"""Answers: a session reads a prompt through a working context and writes the answer, which is
scored by what it contains (`launch/evaluate.py --tasks ruler,stories`).
"""
