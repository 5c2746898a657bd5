import keras
import numpy as np
import pytest

from carflavor.layers import Scale


def call(layer, inputs):
    return keras.ops.convert_to_numpy(layer(np.asarray(inputs, "float32")))


def test_scale_golden_output():
    layer = Scale()
    layer.build((None, 3))
    layer.gamma.assign([2.0, 0.5, -1.0])
    layer.beta.assign([0.25, -1.0, 3.0])
    np.testing.assert_array_equal(
        call(layer, [[1.0, 2.0, 3.0], [-4.0, 0.0, 8.0]]),
        [[2.25, 0.0, 0.0], [-7.75, -1.0, -5.0]],
    )


@pytest.mark.parametrize(("axis", "shape"), [(-1, (2, 5, 4, 3)), (1, (2, 3, 5, 4)), (-2, (2, 5, 3, 4)), (1, (2, 3))])
def test_scale_equals_numpy(axis, shape):
    random = np.random.default_rng(0)
    inputs = random.normal(size=shape).astype("float32")
    gamma, beta = random.normal(size=(2, 3)).astype("float32")
    layer = Scale(axis=axis)
    layer.build(shape)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    expected = np.moveaxis(np.moveaxis(inputs, axis, -1) * gamma + beta, -1, axis)
    np.testing.assert_allclose(call(layer, inputs), expected, rtol=1e-6, atol=1e-6)


def test_scale_begins_as_the_identity():
    np.testing.assert_array_equal(call(Scale(), [[1.5, -2.0]]), [[1.5, -2.0]])


def test_scale_config_brings_everything_back():
    layer = Scale(
        axis=1,
        gamma_initializer=keras.initializers.Constant(2.0),
        beta_initializer="ones",
        gamma_regularizer=keras.regularizers.L2(0.5),
        beta_regularizer="l1",
        gamma_constraint="non_neg",
        beta_constraint=keras.constraints.MaxNorm(3.0),
        name="scale2a_branch2a",
        dtype="bfloat16",
    )
    back = Scale.from_config(layer.get_config())
    assert back.get_config() == layer.get_config()
    assert (back.axis, back.name, back.compute_dtype) == (1, "scale2a_branch2a", "bfloat16")
    assert back.gamma_initializer.value == 2.0
    assert isinstance(back.beta_initializer, keras.initializers.Ones)
    assert back.gamma_regularizer.l2 == pytest.approx(0.5)
    assert isinstance(back.beta_regularizer, keras.regularizers.L1)
    assert isinstance(back.gamma_constraint, keras.constraints.NonNeg)
    assert back.beta_constraint.max_value == 3.0


def test_scale_regularizers_and_constraints_act():
    layer = Scale(gamma_initializer=keras.initializers.Constant(-2.0), gamma_regularizer=keras.regularizers.L2(0.25))
    call(layer, [[1.0, 1.0]])
    assert [float(loss) for loss in layer.losses] == [2.0]  # 0.25 * (4 + 4)
    constrained = Scale(gamma_constraint="non_neg")
    call(constrained, [[1.0, 1.0]])
    np.testing.assert_array_equal(constrained.gamma.constraint(keras.ops.array([-1.0, 2.0])), [0.0, 2.0])


def test_scale_name_in_saved_models_never_changes():
    assert keras.saving.get_registered_name(Scale) == "carflavor>Scale"
    assert keras.saving.get_registered_object("carflavor>Scale") is Scale


def test_scale_passes_masks_on_and_keeps_shapes():
    assert Scale().supports_masking
    assert Scale().compute_output_shape((None, 7, 7, 64)) == (None, 7, 7, 64)


@pytest.mark.parametrize(
    ("axis", "shape", "message"),
    [
        (0, (2, 3), "Received: axis=0, input_shape=(2, 3)"),
        (4, (2, 3), "Received: axis=4, input_shape=(2, 3)"),
        (-2, (2, 3), "Received: axis=-2, input_shape=(2, 3)"),
        (-1, (2, None), "Received: input_shape=(2, None)"),
    ],
)
def test_scale_refuses_axes_without_channels(axis, shape, message):
    with pytest.raises(ValueError) as error:
        Scale(axis=axis).build(shape)
    assert str(error.value).endswith(message)


@pytest.mark.parametrize("axis", ["last", 1.0, True, [3]])
def test_scale_refuses_an_axis_that_is_no_int(axis):
    with pytest.raises(TypeError, match="Expected axis to be an int. Received: axis="):
        Scale(axis=axis)
