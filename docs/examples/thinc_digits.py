"""
thinc: an optimizer that is a function
======================================

``model.finish_update(optimizer)`` calls ``optimizer(key, parameter, gradient)`` for each
parameter that has a gradient, and keeps the parameter that the call returns::

    python -m pip install thinc scikit-learn

Each key is a tuple ``(node id, name)``, and fastrms takes the same keys. (If some layers of
a model may have no gradient, call ``opt.finish_step()`` at the end of each step.) The
changed lines are marked.

thinc has Adam and SGD, but no RMSProp. For comparison, the function ``textbook`` is RMSProp
in plain NumPy. The final parameters are bit-identical. The program prints::

    560 steps, the same bits: True, test accuracy 0.902
"""

import fastrms
import numpy as np
from sklearn.datasets import load_digits
from thinc.api import Relu, Softmax, chain, fix_random_seed

x, y = load_digits(return_X_y=True)
x, one_hot = (x / 16).astype(np.float32), np.eye(10, dtype=np.float32)[y]
train, test = np.arange(1400), np.arange(1400, len(x))


def textbook(lr, decay_rate=0.9, epsilon=1e-8):
    cache = {}

    def optimizer(key, parameter, gradient):
        cache[key] = decay_rate * cache.get(key, 0) + (1 - decay_rate) * gradient**2
        parameter = parameter - lr * gradient / (np.sqrt(cache[key]) + epsilon)
        gradient[...] = 0  # in thinc, the optimizer clears gradients
        return parameter, gradient

    return optimizer


def trained(swapped):
    fix_random_seed(0)
    model = chain(Relu(64), Softmax())
    model.initialize(x[:2], one_hot[:2])
    parameters = {
        (node.id, name): node.get_param(name)
        for node in model.walk()
        for name in node.param_names
    }
    if swapped:
        opt = fastrms.RMSProp(parameters, lr=2e-3)  # changed

        def optimizer(key, _, gradient):  # changed
            return opt.step_parameter(key, gradient), gradient.fill(0)  # changed

    else:
        optimizer = textbook(lr=2e-3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = rng.permutation(train)
        for start in range(0, len(order), 50):
            rows = order[start : start + 50]
            probabilities, backprop = model.begin_update(x[rows])
            backprop((probabilities - one_hot[rows]) / len(rows))
            model.finish_update(optimizer)
    right = model.predict(x[test]).argmax(axis=1) == y[test]
    nodes = {node.id: node for node in model.walk()}
    return [nodes[number].get_param(name) for number, name in parameters], right.mean()


theirs, _ = trained(swapped=False)
ours, accuracy = trained(swapped=True)
same = all(map(np.array_equal, theirs, ours))
print(f"560 steps, the same bits: {same}, test accuracy {accuracy:.3f}")
