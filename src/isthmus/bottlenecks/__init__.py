"""Features → `Code`: discrete, sparse, entropic, key-value…"""
