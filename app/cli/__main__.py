from packforcing.app.cli import main

main()
