"""Whether this machine, its folders and the hosts around it can train: the checks of
`tools/doctor.py`. They change nothing.
"""
