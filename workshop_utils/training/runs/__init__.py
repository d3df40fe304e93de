"""What both paths of training share: launch, events, records and the environment of the training
processes."""
