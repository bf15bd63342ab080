// Shows the values under the pointer. They are computed from the drawn points, so that no number is in the page twice.
(function () {
  var tip = document.createElement('div')
  tip.id = 'tip'
  tip.hidden = true
  document.body.appendChild(tip)

  function text(value) {
    return Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString('en') : String(+value.toPrecision(4))
  }

  document.querySelectorAll('figure.chart svg').forEach(function (svg) {
    var X = svg.dataset.x.split(' ').map(Number), Y = svg.dataset.y.split(' ').map(Number)
    var plot = svg.dataset.plot.split(' ').map(Number)  // left, right, top, bottom in the units of the view box
    var guide = svg.querySelector('.guide'), series = {}
    svg.querySelectorAll('polyline.s,circle.s').forEach(function (element) {
      var points = series[element.dataset.name] = series[element.dataset.name] || []
      if (!element.points) points.push([+element.getAttribute('cx'), +element.getAttribute('cy')])
      for (var i = 0; element.points && i < element.points.numberOfItems; i++) {
        points.push([element.points.getItem(i).x, element.points.getItem(i).y])
      }
    })

    function value(y) {
      var share = (plot[3] - y) / (plot[3] - plot[2])
      return 'log' in svg.dataset ? Y[0] * Math.pow(Y[1] / Y[0], share) : Y[0] + share * (Y[1] - Y[0])
    }

    function nearest(points, x) {
      return points.reduce(function (a, b) { return Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a })
    }

    svg.addEventListener('pointermove', function (event) {
      var box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width
      var names = Object.keys(series)
      if (!names.length) return
      var at = nearest(names.map(function (name) { return nearest(series[name], x) }), x)[0]
      var step = Math.round(X[0] + (at - plot[0]) / (plot[1] - plot[0]) * (X[1] - X[0]))
      var lines = ['step ' + (X[1] > X[0] ? step : X[0]).toLocaleString('en')]
      names.forEach(function (name) {
        var point = nearest(series[name], at)
        if (Math.abs(point[0] - at) < 2) lines.push(name + '  ' + text(value(point[1])))
      })
      guide.removeAttribute('hidden')
      guide.setAttribute('x1', at)
      guide.setAttribute('x2', at)
      tip.textContent = lines.join('\n')
      tip.hidden = false
      tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + 'px'
      tip.style.top = Math.max(event.clientY - tip.offsetHeight - 10, 4) + 'px'
    })
    svg.addEventListener('pointerleave', function () {
      tip.hidden = true
      guide.setAttribute('hidden', '')
    })
  })
})()
