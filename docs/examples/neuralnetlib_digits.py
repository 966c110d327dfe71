"""
neuralnetlib: one parameter at a time
=====================================

In the backward pass, neuralnetlib calls ``optimizer.update(name, parameter, gradient)`` for
each parameter as soon as its gradient exists, and expects the array itself to change::

    python -m pip install neuralnetlib matplotlib scikit-learn

``opt.step_parameter(name, gradient)`` updates one parameter. The step is counted after the
last parameter. The changed lines are marked.

Layers draw their weights in the first forward pass. So the program runs a forward pass on
a single row before it makes the optimizer. The final parameters are bit-identical to those
of neuralnetlib's own RMSprop.
"""

import fastrms
import matplotlib.pyplot as plt
import numpy as np
from neuralnetlib.layers import Dense, Input
from neuralnetlib.models import Sequential
from neuralnetlib.optimizers import RMSprop
from sklearn.datasets import load_digits

x, y = load_digits(return_X_y=True)
x, one_hot = x / 16, np.eye(10)[y]
train, test = slice(1400), slice(1400, None)


def parameters(model):
    return {
        f"{i}.{name}": array
        for i, layer in enumerate(model.layers)
        for name, array, _ in layer.get_trainable_parameters()
    }


def trained(swapped):
    model = Sequential(random_state=0)
    model.add(Input(64))
    model.add(Dense(64, activation="tanh"))
    model.add(Dense(10, activation="softmax"))
    model.compile("categorical_crossentropy", RMSprop(learning_rate=2e-3))
    model.forward_pass(x[:1])
    if swapped:
        opt = fastrms.RMSProp(parameters(model), lr=2e-3, in_place=True)  # changed
        model.optimizer.update = lambda name, _, g: opt.step_parameter(name, g)  # changed
    history = model.fit(x[train], one_hot[train], epochs=20, batch_size=50, verbose=False)
    right = model.predict(x[test]).argmax(axis=1) == y[test]
    return parameters(model), history["loss"], right.mean()


theirs, their_losses, _ = trained(swapped=False)
ours, our_losses, accuracy = trained(swapped=True)
same = all(np.array_equal(theirs[name], ours[name]) for name in theirs)
print(f"560 steps, the same bits: {same}, test accuracy {accuracy:.3f}")

# %%
# Both optimizers give the same loss in each epoch:

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(their_losses, color="#BBBBBB", linewidth=5, label="neuralnetlib's RMSprop")
axes.plot(our_losses, color="#0072B2", linestyle="dashed", label="fastrms")
axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
axes.legend(frameon=False)
plt.show()
