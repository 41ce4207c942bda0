"""Floor 0: messages, frames, activation codec, session state machines, sampler.

Pure: no socket, no clock (`now` is passed in), no thread.
"""
