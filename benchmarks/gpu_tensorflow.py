"""What `gpu.py` needs from TensorFlow, for which it has no sides written by hand."""

import platform

import tensorflow as tf

GPUS = tf.config.list_physical_devices("GPU")
training, ATTACKS = None, {}


def name():
    """Returns the name of the device."""
    if not GPUS:
        return platform.machine() + " CPU"
    return tf.config.experimental.get_device_details(GPUS[0])["device_name"]


def wait(network):
    """Waits for the last assignment to a weight."""
    network.trainable_variables[-1].numpy()


def begin_peak():
    """Forgets the peak, and returns the bytes in use; `None` on a CPU."""
    if not GPUS:
        return None
    tf.config.experimental.reset_memory_stats("GPU:0")
    return tf.config.experimental.get_memory_info("GPU:0")["current"]


def peak(before):
    """Returns the peak of the memory beyond what was in use before."""
    if before is None:
        return None
    return {"bytes": tf.config.experimental.get_memory_info("GPU:0")["peak"] - before}


def is_out_of_memory(error):
    """Returns whether an error says that the memory of the device is short."""
    return isinstance(error, tf.errors.ResourceExhaustedError)
