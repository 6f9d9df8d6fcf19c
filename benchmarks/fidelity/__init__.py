"""Is a predicted learning rate right for one step, and what is it worth after a change of the batch size?"""
