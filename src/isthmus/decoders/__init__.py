"""Features → pixels, labels, boxes, masks, words, digits; and necks."""
