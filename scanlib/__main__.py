from scanlib.cli import main

main()
