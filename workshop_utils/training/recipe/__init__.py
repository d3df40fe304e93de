"""NeMo 2.0 recipes: options, data, training, test and export, the seven phases of `workshop
recipe`."""
