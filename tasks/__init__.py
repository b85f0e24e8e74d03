"""What is learned: one task a file. Listing and finding tasks needs no torch; importing one does."""

# name -> (where the class is, what it is in one line). Sorted by how soon a newcomer would want it.
TASKS: dict[str, tuple[str, str]] = {
    "digits": ("tasks.digits:Digits", "1,797 handwritten digits of 8x8 pixels, bundled: MLP, CNN, ResNet"),
    "mnist": ("tasks.mnist:Mnist", "70,000 handwritten digits of 28x28 pixels: MLP, CNN, ResNet"),
    "fashion": ("tasks.mnist:Fashion", "pictures of clothes, 28x28 pixels; 1,200 of them bundled: MLP, CNN, ResNet"),
    "housing": ("tasks.housing:Housing", "house prices from 13 features, 506 rows bundled: MLP regression"),
    "reviews": ("tasks.reviews:Reviews", "sentiment of Chinese reviews: jieba words, LSTM"),
}
