"""The model: positions, backbone, GistNet, LensNet, and the root module that ZeRO-3 runs in one
forward.
"""
