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
    var guide = svg.querySelector('.guide'), series = {}, overSteps = svg.dataset.xname === 'step'
    svg.querySelectorAll('polyline.s,circle.s').forEach(function (element) {
      var points = series[element.dataset.name] = series[element.dataset.name] || []
      var label = element.dataset.label
      if (!element.points) points.push([+element.getAttribute('cx'), +element.getAttribute('cy'), label])
      for (var i = 0; overSteps && element.points && i < element.points.numberOfItems; i++) {
        points.push([element.points.getItem(i).x, element.points.getItem(i).y])
      }
    })
    var names = Object.keys(series).filter(function (name) { return series[name].length })

    function atX(x) {
      return X[0] + (x - plot[0]) / (plot[1] - plot[0]) * (X[1] - X[0])
    }

    function atY(y) {
      var share = (plot[3] - y) / (plot[3] - plot[2])
      return 'log' in svg.dataset ? Y[0] * Math.pow(Y[1] / Y[0], share) : Y[0] + share * (Y[1] - Y[0])
    }

    function nearest(points, distance) {
      return points.reduce(function (a, b) { return distance(b) < distance(a) ? b : a })
    }

    function ofStep(x) {  // the nearest step, and the value of every line there
      function away(point) { return Math.abs(point[0] - x) }
      var at = nearest(names.map(function (name) { return nearest(series[name], away) }), away)[0]
      var lines = ['step ' + (X[1] > X[0] ? Math.round(atX(at)) : X[0]).toLocaleString('en')]
      names.forEach(function (name) {
        var point = nearest(series[name], function (point) { return Math.abs(point[0] - at) })
        if (Math.abs(point[0] - at) < 2) lines.push(name + '  ' + text(atY(point[1])))
      })
      return [at, lines]
    }

    function ofPoint(x, y) {  // the nearest point of a path
      function away(point) { return Math.hypot(point[0] - x, point[1] - y) }
      var name = nearest(names, function (name) { return away(nearest(series[name], away)) })
      var point = nearest(series[name], away)
      var first = name + (point[2] ? '  ' + point[2] : '')
      return [point[0], [first, svg.dataset.xname + '  ' + text(atX(point[0])), 'value  ' + text(atY(point[1]))]]
    }

    svg.addEventListener('pointermove', function (event) {
      if (!names.length) return
      var box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal
      var x = (event.clientX - box.left) * view.width / box.width
      var y = view.y + (event.clientY - box.top) * view.height / box.height
      var shown = overSteps ? ofStep(x) : ofPoint(x, y)
      guide.removeAttribute('hidden')
      guide.setAttribute('x1', shown[0])
      guide.setAttribute('x2', shown[0])
      tip.textContent = shown[1].join('\n')
      tip.hidden = false
      tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + 'px'
      tip.style.top = Math.max(event.clientY - tip.offsetHeight - 10, 4) + 'px'
    })
    svg.addEventListener('pointerleave', function () {
      tip.hidden = true
      guide.setAttribute('hidden', '')
    })
  })
})()
