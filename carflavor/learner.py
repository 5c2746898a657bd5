"""The model that is fitted: a network in its training form, augmentation before it, an average behind it."""

import keras
import numpy as np
import tensorflow as tf

from carflavor.networks import copy_at_size
from carflavor.networks.training_form import training_form

_HEAD_BATCH = 64
_HEAD_LEARNING_RATE = 0.003


class Learner(keras.Model):
    """Augments photos and fits a network to them.

    Args:
        network: `keras.Model` that learns; its last layer is the head.
        augmentation: Layer from `(photos, targets)` to `(photos, targets)`.
        class_weights: (C,) float32, what a photo of each class counts, or None.
    """

    def __init__(self, network, augmentation, class_weights=None):
        super().__init__(name="learner")
        self.network = training_form(network)
        self.augmentation = augmentation
        self._class_weights = None if class_weights is None else tf.constant(class_weights, tf.float32)

    @property
    def state(self):
        """Variables that a training which goes on needs: of layers, random generators and the built optimizer."""
        return [*self.network.variables, *self.augmentation.variables, *self.optimizer.variables]

    def call(self, photos, training=False):
        if photos.shape[1:] != self.network.input_shape[1:]:
            # Stored squares, on which Keras tries a model before it is fitted on several devices.
            photos = keras.ops.image.resize(photos, self.network.input_shape[1:3])
        return self.network(photos, training=training)

    def train_step(self, data):
        photos, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
        photos, targets = self.augmentation(photos, targets)
        if self._class_weights is None:
            return super().train_step((photos, targets))
        # Of a mixed target, the mean of what its classes count.
        return super().train_step((photos, targets, tf.linalg.matvec(targets, self._class_weights)))


def compile_model(model, config, head, steps_per_epoch):
    """Compiles a model with the optimizer and the loss that a training has.

    Args:
        model: `keras.Model` to compile: a `Learner`, or a network.
        config: `TrainConfig` without `auto`.
        head: Last layer of the network that learns.
        steps_per_epoch: Batches an epoch.
    """
    model.compile(
        build_optimizer(config, head, steps_per_epoch),
        keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing),
        metrics=["accuracy"],
        # XLA is several times slower on this network's CPU kernels than TensorFlow's own (oneDNN).
        jit_compile=False,
    )


def build_optimizer(config, head, steps_per_epoch):
    """Builds an optimizer whose learning rate rises for a tenth of the steps and falls as a cosine to zero.

    Args:
        config: `TrainConfig` without `auto`.
        head: Last layer of the network that learns, which learns at the full rate.
        steps_per_epoch: Batches an epoch.
    """
    steps = config.epochs * steps_per_epoch
    warmup_steps = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(steps - warmup_steps, 1),
    )
    options = {"weight_decay": config.weight_decay}
    if config.ema:
        options |= {"use_ema": True, "ema_momentum": config.ema}
    if config.optimizer == "sgd":
        optimizer = TwoRateSGD(head, config.backbone_rate, schedule, momentum=0.9, nesterov=True, **options)
    else:
        optimizer = TwoRateAdamW(head, config.backbone_rate, schedule, **options)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return optimizer


class TwoRates:
    """Part of an optimizer: a lower learning rate for all but the head.

    Pretrained layers need less change than a new one.

    Args:
        head: The layer that learns at the full rate.
        backbone_rate: Factor of the learning rate for all other layers.
        learning_rate: Learning rate or schedule.
        **kwargs: What the Keras optimizer takes.
    """

    def __init__(self, head, backbone_rate, learning_rate, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self._head_variables = {id(variable) for variable in head.trainable_variables}
        self._backbone_rate = backbone_rate

    def update_step(self, gradient, variable, learning_rate):
        own = self._trainable_variables[self._get_variable_index(variable)]
        rate = 1.0 if id(own) in self._head_variables else self._backbone_rate
        super().update_step(gradient, variable, learning_rate * rate)


class FusedAdamW(keras.optimizers.AdamW):
    """AdamW that updates a variable in one of TensorFlow's kernels.

    Keras does so in a dozen operations, each of which goes through all weights in memory: with it a step of ResNet-152
    in bfloat16, of 8 photos of 224 px, took 1.19 s, and with the kernel 1.12 s.
    """

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        step = tf.cast(self.iterations + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.pow(self.beta_1, step),
            beta2_power=tf.pow(self.beta_2, step),
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


class TwoRateAdamW(TwoRates, FusedAdamW):
    """AdamW with `TwoRates`."""


class TwoRateSGD(TwoRates, keras.optimizers.SGD):
    """SGD with `TwoRates`."""


def copy_to_train(network, precision, size=None):
    """Returns a copy of a network with the same values that computes in another precision, on photos of another size.

    Args:
        network: `keras.Model` whose layers are the same for every size of photo.
        precision: Name of a Keras dtype policy. The last layer keeps its own: probabilities are float32.
        size: Side of the square input in pixels, where it is another.
    """

    def clone_layer(layer):
        own = layer is network.layers[-1]
        return type(layer).from_config(layer.get_config() | ({} if own else {"dtype": precision}))

    return copy_at_size(network, size or network.input_shape[1], clone_layer)


def freeze_statistics(network):
    """Has every BatchNormalization normalise with the statistics that it has, in training, too.

    A head that was trained on features in inference mode knows the features of that mode. With the statistics of
    batches a pretrained network is another one at first: of a head that was right about all of its training photos,
    2 % were left on the same photos.

    Args:
        network: `keras.Model`; its `Scale` layers go on learning.
    """
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False


def average_statistics(network, momentum):
    """Has every BatchNormalization average its statistics over as many steps as the weights are averaged over.

    The averaged weights want the statistics of the same steps. Those of the last ten batches, which the networks'
    own momentum of 0.9 keeps, vary more: validation accuracy went up and down by up to two points in the last epochs,
    at a few hundredths of the learning rate.

    Args:
        network: `keras.Model`.
        momentum: That of the average of the weights; a layer whose own is larger keeps it.
    """
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = max(layer.momentum, momentum)


def take_averages(network, learning, learner):
    """Gives a network the averaged values of the one that learns, or its present ones where none are averaged.

    Args:
        network: `keras.Model` to assign to.
        learning: `keras.Model` of the same layers, the one that `learner` was made of.
        learner: Compiled `Learner`.
    """
    counterparts = {}
    for variable, learned in zip(network.variables, learning.variables, strict=True):
        variable.assign(learned)
        counterparts[id(learned)] = variable
    if learner.optimizer.use_ema:
        # The optimizer's own way to write its averages into variables, in the order in which it knows them: here into
        # those of another network.
        learner.optimizer.finalize_variable_values([counterparts[id(own)] for own in learner.trainable_variables])


def predict(network, batches, on_photos=None):
    """Returns what a network makes of photos in inference, an array of shape (N, ...).

    Not `network.predict`, which under several devices answers for each batch once a device.

    Args:
        network: `keras.Model`.
        batches: `carflavor.data.batches.SquashedBatches`.
        on_photos: Optional function that is called with the number of photos of each batch that is done.
    """
    call = tf.function(lambda photos: network(photos, training=False), jit_compile=False, reduce_retracing=True)
    outputs = []
    for index in range(len(batches)):
        photos, _ = batches[index]
        outputs.append(call(photos).numpy())
        if on_photos is not None:
            on_photos(len(photos))
    return np.concatenate(outputs)


def fit_head(network, batches, epochs, label_smoothing, class_weights, on_photos):
    """Trains the last layer on what the layers before it make of the photos, computed once.

    It takes seconds where training the whole network takes minutes, and spares pretrained layers the gradients of a
    head that knows nothing.

    Args:
        network: `keras.Model` whose last layer is a softmax `Dense`.
        batches: `carflavor.data.batches.SquashedBatches`.
        epochs: Times that the features are gone through.
        label_smoothing: As in training.
        class_weights: (C,) array, what a photo of each class counts, or None.
        on_photos: Function that is called with the number of photos of each batch whose features are there.

    Returns:
        Share of the photos that the network is right about now.
    """
    head = network.layers[-1]
    features = predict(training_form(keras.Model(network.input, head.input)), batches, on_photos)
    targets = keras.utils.to_categorical(batches.labels, head.units)
    model = keras.Sequential([keras.Input(features.shape[1:]), keras.layers.Dense(head.units, activation="softmax")])
    steps = epochs * -(-len(features) // _HEAD_BATCH)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(_HEAD_LEARNING_RATE, steps)),
        keras.losses.CategoricalCrossentropy(label_smoothing=label_smoothing),
        metrics=["accuracy"],
        jit_compile=False,
    )
    counts = None if class_weights is None else class_weights[batches.labels]
    history = model.fit(features, targets, _HEAD_BATCH, epochs, verbose=0, sample_weight=counts)
    head.set_weights(model.layers[-1].get_weights())
    return history.history["accuracy"][-1]
