"""The course: data, networks, training, experiments, metrics, figures, and the runner of the notebooks.

Its modules use the library, `fcnn_utils`; the library does not use them.
"""
