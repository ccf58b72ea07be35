"""Pipeline: joins videos, networks, stores and heads.

config registry progress units < datasets decoders backbones < extraction < experiments < analysis
< cli: each folder imports from those before it, and a test holds this.
"""
