"""Stages: one file each, plain functions over tables. No stage imports another."""
