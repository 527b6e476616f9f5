"""The course: data, networks, training, experiments, metrics, figures, and the runner of the notebooks.

It imports the library, `fcnn_utils`; the library does not import it.
"""
