"""python -m pom_ext.cli"""

from . import main

main()
