"""Is the learning rate that the callback predicts the one that a sweep would have found?"""
