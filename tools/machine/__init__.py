"""The checks of `tools/doctor.py`: of this machine, its folders and other hosts. They change
nothing.
"""
