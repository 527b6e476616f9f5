"""Names of the networks in figures and tables; they are here so that figures need no Keras."""

TITLES = {
    "simple": "simple",
    "wider_factorized": "wider, factorized",
    "wider_separable": "wider, separable",
    "deeper_dense": "deeper, dense",
    "deeper_tucker": "deeper, Tucker-2",
    "deeper_separable": "deeper, separable",
    "wider_dense": "wider, dense",
}
