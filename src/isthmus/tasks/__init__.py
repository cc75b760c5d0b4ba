"""The way in and the way out for one kind of answer: data checked and loaded, training, measuring, a model to keep."""
