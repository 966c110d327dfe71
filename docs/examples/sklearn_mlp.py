"""
scikit-learn: MLPClassifier with RMSProp
========================================

MLPClassifier has SGD and Adam, but no RMSProp, and no argument for another optimizer. This
program replaces scikit-learn's private class ``SGDOptimizer``::

    python -m pip install matplotlib scikit-learn

Then ``solver="sgd"`` means RMSProp. Batches, penalty, early stopping, pipelines and clones
work as before. A later scikit-learn may rename the private class; the program works with
version 1.9.

The coefficients are updated in place. With pickle, the loaded model and its optimizer
still share their arrays. With joblib, each of them has its own copies. The class notices
this and makes a new optimizer. For comparison, a second class computes the textbook rule.
The coefficients are bit-identical.
"""

import io
import pickle

import fastrms
import joblib
import matplotlib.pyplot as plt
import numpy as np
from fastrms.kernels.reference import ReferenceRMSProp
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier, _multilayer_perceptron


class RMSProp(_multilayer_perceptron.SGDOptimizer):
    """`fit` makes this optimizer, and passes the gradients to `update_params`."""

    def __init__(self, params, learning_rate_init, *others):
        super().__init__(params, learning_rate_init, *others)
        self.opt = fastrms.RMSProp(params, lr=learning_rate_init, in_place=True)

    def update_params(self, params, grads):
        if params[0] is not self.opt.params[0]:  # after joblib.load
            state = self.opt.state_dict()
            self.opt = fastrms.RMSProp(params, in_place=True)
            self.opt.load_state_dict(state)
        self.opt.step(grads)

    def iteration_ends(self, time_step):
        super().iteration_ends(time_step)  # learning_rate="adaptive" and "invscaling"
        self.opt.lr = self.learning_rate


class Textbook(RMSProp):
    """The same rule in plain NumPy. Its new arrays are copied to the coefficients."""

    def __init__(self, params, learning_rate_init, *others):
        super().__init__(params, learning_rate_init, *others)
        self.opt = ReferenceRMSProp(params, lr=learning_rate_init)

    def update_params(self, params, grads):
        for param, updated in zip(params, self.opt.step(grads), strict=True):
            param[...] = updated


x, y = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(
    x / 16, y, test_size=0.2, random_state=0, stratify=y
)
model = MLPClassifier((64,), solver="sgd", learning_rate_init=2e-3, random_state=0)


def fitted(optimizer):
    _multilayer_perceptron.SGDOptimizer = optimizer  # changed
    return clone(model).fit(train_x, train_y)


def same(one, other):
    arrays = one.coefs_ + one.intercepts_, other.coefs_ + other.intercepts_
    return all(map(np.array_equal, *arrays))


ours = fitted(RMSProp)
print(f"{ours.n_iter_} epochs, test accuracy {ours.score(test_x, test_y):.3f}")
textbook = fitted(Textbook)
print(f"the same bits as the textbook: {same(ours, textbook)}")

# %%
# The same loss in each epoch:

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(textbook.loss_curve_, color="#BBBBBB", linewidth=5, label="textbook rule")
axes.plot(ours.loss_curve_, color="#0072B2", linestyle="dashed", label="fastrms")
axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
axes.legend(frameon=False)
plt.show()

# %%
# Models that were saved and loaded continue with the same bits:

file = io.BytesIO()
joblib.dump(ours, file)
file.seek(0)
pickled, loaded = pickle.loads(pickle.dumps(ours)), joblib.load(file)
for model in (ours, pickled, loaded):
    model.partial_fit(train_x, train_y)
print(f"one more epoch after pickle: {same(ours, pickled)}, joblib: {same(ours, loaded)}")
