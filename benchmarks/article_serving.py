"""What `serving.py` holds ours against: the article's way to serve, `keras_model.predict` in an `mlflow.pyfunc` model.

The article is "A Convolutional Neural Network Implementation For Car Classification" (Databricks and Data Insights, May
2020, https://databricks.com/blog/2020/05/14/a-convolutional-neural-network-implementation-for-car-classification.html).
Its listing was not at hand for this file, which follows what it is known to do: a `PythonModel` whose `load_context`
reads the Keras model with `custom_objects={"Scale": Scale}` and the names from `cars_meta.mat`, and whose `predict`
takes the one photo in base64 of a request's first row through `base64.decodebytes`, `cv2.imdecode`, `cv2.resize` to
224 x 224, `np.expand_dims`, `keras_model.predict` and `np.argmax`, and answers label and probability. Where that leaves
a choice it is taken from `demo.py` of https://github.com/foamliu/Car-Recognition, which has the same network: RGB, and
bytes for the network. So the lines on the left below are the calls of their time, not quotations. Nothing was done to
make it faster or slower.

Repairs, with what happens without them under Keras 3 and MLflow 3:

1.  mlflow.keras.log_model(keras_model, ..., custom_objects={"Scale": Scale})
    -> mlflow.tensorflow.save_model(keras_model, ..., custom_objects={"carflavor>Scale": Scale})
    The writer in `mlflow.keras` has no `custom_objects` any more. That in `mlflow.tensorflow` keeps them as a
    cloudpickle, as `mlflow.keras` did, and Keras looks a class up by the name it is registered under.
2.  mlflow.keras.load_model(path) -> mlflow.tensorflow.load_model(path)
    The counterpart of 1.
3.  from keras.engine import Layer, and a Scale of K.variable and K.reshape -> the Scale of carflavor
    ModuleNotFoundError: No module named 'keras.engine'; nor has `keras.backend` these functions. The weights are the
    same arrays, the formula is the same.
4.  (224, 224) -> the network's own input size
    It is 224 x 224, unless `serving.py` is given a model of another size.
5.  Requests {"columns": [...], "data": [...]} -> {"dataframe_split": {"columns": [...], "data": [...]}}
    The old form is answered with 400 since MLflow 2.

Module level only has what the class needs: MLflow pickles it by value, as it does a class of a notebook.
"""

import base64

import cloudpickle
import cv2
import mlflow
import numpy as np
import scipy.io


class KerasImageClassifier(mlflow.pyfunc.PythonModel):
    """Wraps a Keras network: one photo a request, decoded and scored in the thread that MLflow calls it in."""

    def load_context(self, context):
        self.keras_model = mlflow.tensorflow.load_model(context.artifacts["keras_model"])
        self.img_height, self.img_width = self.keras_model.input_shape[1:3]
        cars_meta = scipy.io.loadmat(context.artifacts["cars_meta"])
        self.class_names = np.transpose(cars_meta["class_names"])  # (196, 1)

    def predict(self, context, model_input):
        photo = base64.decodebytes(model_input.iloc[0, 0].encode())
        bgr_img = cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)
        bgr_img = cv2.resize(bgr_img, (self.img_width, self.img_height))
        rgb_img = cv2.cvtColor(bgr_img, cv2.COLOR_BGR2RGB)
        rgb_img = np.expand_dims(rgb_img, 0)
        preds = self.keras_model.predict(rgb_img)
        prob = np.max(preds)
        class_id = np.argmax(preds)
        return {"label": self.class_names[class_id][0][0], "prob": prob}


def save_article_model(network, class_names, scale, path):
    """Writes the article's model directory.

    Args:
        network: `keras.Model` from uint8 RGB photos `(batch, S, S, 3)` to probabilities `(batch, C)`.
        class_names: C names.
        scale: The class `Scale`.
        path: Folder to write, and the prefix of two more beside it.
    """
    this_module, scale_module = (__import__(item.__module__, fromlist=["_"]) for item in (KerasImageClassifier, scale))
    names = np.empty((1, len(class_names)), object)
    names[0] = class_names
    scipy.io.savemat(f"{path}-cars_meta.mat", {"class_names": names})
    for module in (this_module, scale_module):
        cloudpickle.register_pickle_by_value(module)
    try:
        mlflow.tensorflow.save_model(
            network, f"{path}-keras", custom_objects={"carflavor>Scale": scale}, pip_requirements=[]
        )
        mlflow.pyfunc.save_model(
            path,
            python_model=KerasImageClassifier(),
            artifacts={"keras_model": f"{path}-keras", "cars_meta": f"{path}-cars_meta.mat"},
            pip_requirements=[],
        )
    finally:
        for module in (this_module, scale_module):
            cloudpickle.unregister_pickle_by_value(module)
